"""The format of a store on disk: layout, manifest, Zarr documents, commit log, shard files."""
