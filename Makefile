.PHONY: check lint types test torches bench

check: lint types test  ## what .ci/run checks, in the current environment

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest

torches:  ## the suite on the lowest torch that we admit, one between, and the newest
	.ci/torches 2.11.* 2.14.* 2.15.*

bench:  ## every method beside dense timm in every runtime, on an otherwise idle machine
	KINETO_LOG_LEVEL=99 python benchmarks/compare.py
