"""What a container can wait for in vain, and what helps then."""

# Reasons of a waiting container. ErrImagePull alone may pass: it becomes one of these.
HOPELESS = {
    "ImagePullBackOff": "correct the image in the catalog, or give the account a pull secret",
    "InvalidImageName": "correct the image in the catalog",
    "ImageInspectError": "look at the container runtime on the node",
    "ErrImageNeverPull": "load the image on the node, or set images.pull_policy: IfNotPresent",
    "CreateContainerConfigError": "look at the Secrets and ConfigMaps that the Pod wants",
    "CreateContainerError": "look at `kubectl describe pod`",
    "RunContainerError": "look at `kubectl describe pod`",
}
