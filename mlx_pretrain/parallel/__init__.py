"""Many devices and hosts: joining a cluster, agreement between processes, a run folder's owner, meshes, hardware."""
