"""Runs configs, writes what they measure into metafiles, and makes the tables from these."""

from zoo.command import main

if __name__ == '__main__':
    main()
