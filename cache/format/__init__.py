"""What lies where on disk: layout, identity, Zarr documents, commit log, shards."""
