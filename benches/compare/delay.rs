//! A proxy on loopback that makes a store as far away as a real one: each request arrives later than it could.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

/// More connections at a time are closed at once; nginx's are fewer.
const MOST_CONNECTIONS: usize = 256;

/// The proxy; it ends with the process.
pub struct Delay;

impl Delay {
    /// Puts one before this server. Answers with its address.
    pub fn before(server: &str, latency: Duration) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (server, connections) = (server.to_owned(), Arc::new(AtomicUsize::new(0)));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                if connections.fetch_add(1, Relaxed) >= MOST_CONNECTIONS {
                    connections.fetch_sub(1, Relaxed);
                    continue;
                }
                let (server, connections) = (server.clone(), connections.clone());
                thread::spawn(move || {
                    pass(client, &server, latency);
                    connections.fetch_sub(1, Relaxed);
                });
            }
        });
        address
    }
}

fn pass(client: TcpStream, server: &str, latency: Duration) {
    let Ok(upstream) = TcpStream::connect(server) else { return };
    for stream in [&client, &upstream] {
        stream.set_nodelay(true).ok();
    }
    let (Ok(from_server), Ok(to_client)) = (upstream.try_clone(), client.try_clone()) else { return };
    // A request begins with the first bytes of the client after an answer: nobody sends the next one before.
    let answered = Arc::new(AtomicBool::new(true));
    let answers = answered.clone();
    let back = thread::spawn(move || pump(from_server, to_client, || answers.store(true, Relaxed)));
    pump(client, upstream, || {
        if answered.swap(false, Relaxed) {
            thread::sleep(latency);
        }
    });
    back.join().ok();
}

/// Passes on what comes, each piece after `before`.
fn pump(mut from: TcpStream, mut to: TcpStream, before: impl Fn()) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        before();
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}
