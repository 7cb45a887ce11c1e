"""A loopback stand-in of an NDIF server that executes requests and fails on cue."""
