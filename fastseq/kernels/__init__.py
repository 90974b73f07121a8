"""Kernels compiled just in time. Their sources are in the repository's kernels/ folder, mapped here when installed."""
