"""What the server reads and writes: fields of requests, forms of answers."""
