"""Starts NDIF's controller on a running Ray head, deploys one model and waits until it serves.

It runs with NDIF's packages, not with the tests'. The model's size is given, because estimating it would ask the
Hugging Face hub.
"""

import argparse

import ray
from ndif.common.schema.controller import DeploymentConfig
from ndif.services.ray.deployments.controller.controller import app


def main() -> None:
    """Leave the controller and the model's actor behind, detached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ray", required=True, help="address of the Ray head")
    parser.add_argument("--model-key", required=True)
    parser.add_argument("--size-bytes", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--timeout", type=float, required=True, help="seconds for each of the two waits")
    asked = parser.parse_args()
    ray.init(address=asked.ray, namespace="NDIF", logging_level="error", log_to_driver=False)
    app()
    controller = ray.get_actor("Controller")
    config = DeploymentConfig(size_bytes=asked.size_bytes, padding_bias=0, pinned=True, dtype=asked.dtype)
    answer = ray.get(controller.deploy.remote({asked.model_key: config}), timeout=asked.timeout)
    result = answer.results[asked.model_key]
    if result.error:
        raise SystemExit(f"the controller refused to deploy {asked.model_key}: {result.error}")
    actor = ray.get_actor(f"{result.replicas[0]}:ModelActor:{asked.model_key}")
    ray.get(actor.__ray_ready__.remote(), timeout=asked.timeout)


if __name__ == "__main__":
    main()
