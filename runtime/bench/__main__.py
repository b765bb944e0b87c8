from lsmc.runtime.bench.command import main

main()
