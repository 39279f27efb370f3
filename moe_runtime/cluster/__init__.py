"""The processes of the ranks: how they are started, watched and ended."""
