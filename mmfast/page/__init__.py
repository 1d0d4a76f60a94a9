"""`mmfast demo`: a chat page in the browser for the runs on this machine."""
