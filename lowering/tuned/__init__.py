"""Plans that were measured: a cache on disk, and the tables that are shipped, `*.json` beside this file."""
