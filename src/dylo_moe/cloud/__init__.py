"""Training on other machines: where a container runs, and jobs on Vertex AI."""
