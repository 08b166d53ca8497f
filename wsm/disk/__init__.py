"""Direct I/O, targets to write to, safety of block devices, files that are whole or not there."""
