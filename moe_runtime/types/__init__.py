"""Types shared by users and all folders: sampling parameters, outputs, the version. Imports no other folder."""
