"""Files, the cache folder, memory pages of the operating system. Uses nothing else of the package."""
