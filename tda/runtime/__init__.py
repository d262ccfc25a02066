"""Devices, processes, progress, atomic files: what every room stands on."""
