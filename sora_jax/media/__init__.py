"""Video, sound and picture files in and out."""
