"""In place of the package of this name, which needs RDMA: SGLang's own code for it runs as it is."""
