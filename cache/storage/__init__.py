"""Access to files in a local folder or in object storage, behind one interface."""
