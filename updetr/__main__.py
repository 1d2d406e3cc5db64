from updetr.pretrain_task import main

main()
