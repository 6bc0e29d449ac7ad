"""Many devices and many hosts: joining a cluster, reaching agreement between processes, owning a run folder, counts of
what a compiled program does on each device."""
