"""Devices, processes, progress, files and hashes: the ground that every other package uses."""
