"""Meshes of devices and the table of shardings, hosts, chips."""
