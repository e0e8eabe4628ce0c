"""Adapters of other tools as chains: read from disk, turned into one rank and depth, fitted to their base."""
