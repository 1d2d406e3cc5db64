from updetr.train import main

main()
