"""The embedded demo model: a small dense chat model carved into a mixture of experts, built on first use."""
