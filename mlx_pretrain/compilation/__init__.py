"""Compilation ahead of time: absent devices, the programs of commands, and counts of what they compute and send."""
