"""Files on disks that may be full or break: folders and files that appear whole or not at all, and readers of JSON."""
