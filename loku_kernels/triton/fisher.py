def accumulate_squared_grad_(): pass
