"""Interface servers: clients' sockets on one side, ASGI events on links to the workers on the other.

Imports channel_layer only. What decides is in protocol/, without I/O; begin with client.py, the seam between a
protocol and the connection to its application, then http1.py and connections.py. The process itself is server.py.
"""
