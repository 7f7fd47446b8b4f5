"""Names and addresses inside the sandbox.

Each sandbox has a network of its own without a link to the machine's, so that these are the same in
every lab and collide with nothing.
"""

NODE = "node1"
NODE_IP = "10.123.0.10"
NODE_PREFIX = 24
PODS = "10.124.0.0/24"
SERVICES = "10.125.0.0/24"
KUBERNETES_IP = "10.125.0.1"
DNS_IP = "10.125.0.10"
PROMETHEUS_IP = "10.125.0.20"  # a Service of the lab's own: prometheus-operated has no address
API_PORT = 6443
ETCD_PORT = 2379
PROMETHEUS_PORT = 9090
HUB_PORT = 8880
DOMAIN = "cluster.local"
