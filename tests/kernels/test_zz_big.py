import sys; sys.path.insert(0,"/work/wt/h17a/tests/kernels")
import pytest, torch, time
from test_tridiagonal import gram, eigenvalues, assert_same_eigenvalues, EPS, tridiagonal
@pytest.mark.parametrize("r",[531])
@pytest.mark.parametrize("p",[1,3])
@pytest.mark.parametrize("dtype",[torch.float32,torch.float64],ids=str)
def test_big(device,r,p,dtype):
    A=gram("gaussian",r,dtype,device)
    d,e=tridiagonal(A,programs=p)
    truth=torch.linalg.eigvalsh(A.double()); print(r,p,((eigenvalues(d,e)-truth).abs().amax()/(EPS[dtype]*truth.abs().amax())).item())
    assert_same_eigenvalues(d,e,A)
