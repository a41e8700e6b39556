"""Entry point of inspect_ai: importing this makes `--model holdfast/…` known."""

from holdfast.evaluate.inspect_provider import provider

HoldfastAPI = provider()
