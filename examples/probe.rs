use contrastive::objective::*;
use contrastive::{Cpu, Engine};
fn read(p: &str) -> Vec<f32> {
    std::fs::read(p).unwrap().chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let d: usize = a[1].parse().unwrap();
    let (u, v) = (read("/tmp/ref/u.bin"), read("/tmp/ref/v.bin"));
    let tilting = *Tilting::ALL.iter().find(|t| t.name() == a[2]).unwrap();
    let tau: f64 = a[4].parse().unwrap();
    let eps: f64 = a[5].parse().unwrap();
    let objective = match &a[3][..] {
        "c11" => Objective::Conditional { lambda_u: 1., lambda_v: 1. },
        "c20" => Objective::Conditional { lambda_u: 2., lambda_v: 0. },
        "joint" => Objective::Joint,
        "sig" => Objective::Sigmoid { bias: -3.0 },
        _ => panic!(),
    };
    let loss = Loss { tilting, objective, tau, smoothing: eps };
    let (u, v) = (Matrix::f32(&u, d), Matrix::f32(&v, d));
    let batch = Batch { u, v, pairs: Pairs::default(), offset_v: None, moments: None };
    let mut cpu: Cpu = Cpu::new();
    let (mut du, mut dv) = (vec![f32::NAN; u.rows * d], vec![f32::NAN; v.rows * d]);
    let reps = if u.rows > 1000 { 5 } else { 200 };
    let mut best = f64::MAX;
    let mut val = None;
    for _ in 0..reps {
        let t = std::time::Instant::now();
        val = Some(
            cpu.loss(
                &loss,
                &batch,
                Gradients { u: Some(Write::Set(&mut du)), v: Some(Write::Set(&mut dv)), offset_v: None },
            )
            .unwrap(),
        );
        best = best.min(t.elapsed().as_secs_f64());
    }
    let val = val.unwrap();
    println!("{} {} {} {} {}", val.loss, val.grad_tau, val.grad_bias, best * 1e3, cpu.scratch_bytes());
    let w =
        |p: &str, x: &[f32]| std::fs::write(p, x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()).unwrap();
    w("/tmp/ref/du.bin", &du);
    w("/tmp/ref/dv.bin", &dv);
}
