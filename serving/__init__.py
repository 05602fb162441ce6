"""M3 in production: a server (`m3-serve`), a client, and batch jobs (`m3-batch`)."""
