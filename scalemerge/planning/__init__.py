"""Before anything is launched: bytes a rank, bytes on the wire, floor times, the study's cost; arithmetic alone."""
