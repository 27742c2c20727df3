# expect: nothing
"""Automatic mixed precision as the documentation shows it: autocast and a GradScaler, no accumulation."""

import torch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16


def make_model(in_size, out_size, num_layers):
    layers = []
    for _ in range(num_layers - 1):
        layers.append(torch.nn.Linear(in_size, in_size))
        layers.append(torch.nn.ReLU())
    layers.append(torch.nn.Linear(in_size, out_size))
    return torch.nn.Sequential(*layers).to(device)


batch_size, in_size, out_size, num_layers, num_batches, epochs = 32, 64, 16, 3, 12, 2
data = [torch.randn(batch_size, in_size, device=device) for _ in range(num_batches)]
targets = [torch.randn(batch_size, out_size, device=device) for _ in range(num_batches)]
loss_fn = torch.nn.MSELoss().to(device)

net = make_model(in_size, out_size, num_layers)
opt = torch.optim.SGD(net.parameters(), lr=0.001)
scaler = torch.amp.GradScaler(device)

for _ in range(epochs):
    for input, target in zip(data, targets, strict=True):
        with torch.autocast(device_type=device, dtype=dtype):
            output = net(input)
            loss = loss_fn(output, target)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
print(f"loss {loss.item():.3f}, scale {scaler.get_scale():.0f}")
