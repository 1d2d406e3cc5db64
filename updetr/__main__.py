from updetr.train.loop import main

main()
