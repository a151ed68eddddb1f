"""``python -m vitrim``, which launchers of several processes need."""

from vitrim.cli import main

if __name__ == "__main__":
    main()
