"""Reading and writing files that others may have made, and asking servers over HTTP."""
