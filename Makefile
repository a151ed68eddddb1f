.PHONY: check lint types test bench

check: lint types test  ## what .ci/run checks, in the current environment

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest

bench:  ## every method beside dense timm in every runtime, on an otherwise idle machine
	KINETO_LOG_LEVEL=99 python benchmarks/compare.py
