"""Benchmarks: longvid beside others on the same work, each side in a process of its own."""
