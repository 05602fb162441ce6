"""`m3-demo`: a page on which people ask a checkpoint, or a server, about pictures and see what visual tokens buy."""
