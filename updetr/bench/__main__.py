from updetr.bench.run import main

main()
