"""Files, the cache folder, memory pages of the operating system. Imports no other folder of the package."""
