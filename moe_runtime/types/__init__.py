"""What users and all rooms share: sampling parameters, outputs, the version. Uses nothing else of the package."""
