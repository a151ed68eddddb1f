.PHONY: check lint types test bench

check: lint types test  ## what .ci/run checks, in the current environment

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest

bench:  ## rows of results/speed.json, on an otherwise idle machine
	python benchmarks/speed.py
