"""Cases of `check_abuse.py`: what clients, the operating system and files can do to a server."""
