"""Reading and writing files that others may have made, asking servers over HTTP, and where a result comes from."""
