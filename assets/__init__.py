"""A promotion's stages as Dagster assets, one a file. What they do lives in k8s/ and loadtests/."""
