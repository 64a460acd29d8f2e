//! A TCP proxy between the sidecar and its store that does to it what networks do.
//!
//! Threads, no runtime: each test is a process of its own, and what still runs at its end goes with it.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use super::wait_until;

/// What happens to the connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Nothing.
    Pass,
    /// Each chunk of at most 16 KiB comes this much later.
    Delay(Duration),
    /// The next so many connections that send this many bytes to the server are cut there.
    CutUploads { after: u64, times: u32 },
    /// The next so many connections that get this many bytes from the server are cut there.
    CutDownloads { after: u64, times: u32 },
    /// Connections are taken, and nothing ever moves.
    BlackHole,
    /// Connections are closed as soon as they are made, and those that there are, too.
    Refuse,
}

/// Which request is held back.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Hold {
    method: &'static str,
    needle: String,
    /// The request reaches the server, and the answer is what is held back.
    answer_only: bool,
}

/// Which requests are refused, and how many more.
struct Refusal {
    method: &'static str,
    needle: String,
    times: u32,
}

/// What S3 says that nobody tries again.
const DENIED: &str = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: 76\r\n\r\n\
    <?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message/></Error>     ";

/// How S3 says that it gets too many requests.
const SLOW_DOWN: &str = "HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 76\r\n\r\n\
    <?xml version=\"1.0\"?><Error><Code>SlowDown</Code><Message/></Error>         ";

/// Only every so-manieth request is taken.
struct Throttle {
    every: u32,
    seen: u32,
}

struct State {
    mode: Mode,
    /// Counts the changes of `mode`: bytes are counted from the last one on.
    changes: u64,
    hold: Option<Hold>,
    held: u32,
    refusal: Option<Refusal>,
    throttle: Option<Throttle>,
    /// The first lines of what was passed on or refused.
    requests: Vec<String>,
    cuts: u32,
    connections: Vec<TcpStream>,
}

struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

/// The proxy. Everything it does can be changed while it runs.
pub struct Wire {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Wire {
    /// A proxy to this `host:port`.
    pub fn to(target: &str) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = State {
            mode: Mode::Pass,
            changes: 0,
            hold: None,
            held: 0,
            refusal: None,
            throttle: None,
            requests: Vec::new(),
            cuts: 0,
            connections: Vec::new(),
        };
        let shared =
            Arc::new(Shared { target: target.parse().unwrap(), state: Mutex::new(state), changed: Condvar::new() });
        let address = listener.local_addr().unwrap();
        let accepting = shared.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                accepting.clone().accept(client.unwrap());
            }
        });
        Wire { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does this from now on. Connections that hung or are now to be refused are cut.
    pub fn set(&self, mode: Mode) {
        let mut state = self.shared.lock();
        if mode == Mode::Refuse || state.mode == Mode::BlackHole {
            state.cut_all();
        }
        state.mode = mode;
        state.changes += 1;
        self.shared.changed.notify_all();
    }

    /// Holds back each request with this method whose first line contains this.
    pub fn hold(&self, method: &'static str, needle: &str) {
        self.shared.lock().hold = Some(Hold { method, needle: needle.to_owned(), answer_only: false });
    }

    /// The server gets the request and does it; the answer is held back.
    pub fn hold_answer(&self, method: &'static str, needle: &str) {
        self.shared.lock().hold = Some(Hold { method, needle: needle.to_owned(), answer_only: true });
    }

    /// How many requests are held back.
    pub fn held(&self) -> u32 {
        self.shared.lock().held
    }

    /// Waits until a request is held back.
    #[track_caller]
    pub fn wait_for_held(&self) {
        wait_until("a request is held back", Duration::from_secs(60), || self.shared.lock().held > 0);
    }

    /// Holds nothing back any more; the connections of what was held are cut.
    pub fn release(&self) {
        let mut state = self.shared.lock();
        state.hold = None;
        state.held = 0;
        state.changes += 1;
        state.cut_all();
        self.shared.changed.notify_all();
    }

    /// Answers the next so many requests with this method whose first line contains this with 403.
    pub fn refuse(&self, method: &'static str, needle: &str, times: u32) {
        self.shared.lock().refusal = Some(Refusal { method, needle: needle.to_owned(), times });
    }

    /// Takes only every so-manieth request and tells the others to slow down; with 1, takes all.
    pub fn throttle(&self, every: u32) {
        self.shared.lock().throttle = Some(Throttle { every, seen: 0 });
    }

    /// The first lines of the requests so far that were not held back, in their order: those with this method that
    /// contain this.
    pub fn requests(&self, method: &str, needle: &str) -> Vec<String> {
        let fits = |line: &&String| line.starts_with(method) && line.contains(needle);
        self.shared.lock().requests.iter().filter(fits).cloned().collect()
    }

    /// Forgets the requests so far: servers without conditional creation are also asked for what is being stored.
    pub fn forget_requests(&self) {
        self.shared.lock().requests.clear();
    }

    /// How many connections have been cut after some bytes.
    pub fn cuts(&self) -> u32 {
        self.shared.lock().cuts
    }
}

impl State {
    fn cut_all(&mut self) {
        for connection in self.connections.drain(..) {
            connection.shutdown(Shutdown::Both).ok();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn accept(self: Arc<Self>, client: TcpStream) {
        let mut state = self.lock();
        if state.mode == Mode::Refuse {
            return;
        }
        let Ok(server) = TcpStream::connect(self.target) else { return };
        client.set_nodelay(true).ok();
        server.set_nodelay(true).ok();
        state.connections.extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
        drop(state);
        let answer_is_held = Arc::new(Mutex::new(false));
        for direction in [Direction::Up, Direction::Down] {
            let (from, to) = match direction {
                Direction::Up => (&client, &server),
                Direction::Down => (&server, &client),
            };
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let (shared, answer_is_held) = (self.clone(), answer_is_held.clone());
            thread::spawn(move || shared.pump(direction, from, to, &answer_is_held));
        }
    }

    fn pump(&self, direction: Direction, mut from: TcpStream, mut to: TcpStream, answer_is_held: &Mutex<bool>) {
        let mut buffer = [0; 16 * 1024];
        let (mut passed, mut since) = (0, self.lock().changes);
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let refused = (direction == Direction::Up).then(|| self.refuses(&buffer[..n])).flatten();
            if let Some(answer) = refused {
                from.write_all(answer.as_bytes()).ok();
                break;
            }
            let Some(wait) = self.judge(direction, &buffer[..n], &mut passed, &mut since, answer_is_held) else {
                break;
            };
            thread::sleep(wait);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        from.shutdown(Shutdown::Both).ok();
        to.shutdown(Shutdown::Both).ok();
    }

    /// What a request is answered instead of being passed on.
    fn refuses(&self, chunk: &[u8]) -> Option<&'static str> {
        let (line, mut state) = (first_line(chunk), self.lock());
        if let Some(refusal) = &mut state.refusal
            && refusal.times > 0
            && line.starts_with(refusal.method)
            && line.contains(&refusal.needle)
        {
            refusal.times -= 1;
            state.requests.push(line);
            return Some(DENIED);
        }
        let throttle = state.throttle.as_mut().filter(|_| line.ends_with(" HTTP/1.1"))?;
        throttle.seen += 1;
        (throttle.seen % throttle.every != 0).then_some(SLOW_DOWN)
    }

    /// Whether a chunk may pass, and after what pause.
    fn judge(
        &self,
        direction: Direction,
        chunk: &[u8],
        passed: &mut u64,
        since: &mut u64,
        answer_is_held: &Mutex<bool>,
    ) -> Option<Duration> {
        let mut state = self.lock();
        if let (Direction::Up, Some(hold)) = (direction, &state.hold)
            && hold.wants(chunk)
        {
            if hold.answer_only {
                *answer_is_held.lock().unwrap() = true;
            } else {
                state.held += 1;
                return self.block(state);
            }
        }
        if direction == Direction::Down && *answer_is_held.lock().unwrap() {
            state.held += 1;
            return self.block(state);
        }
        let line = first_line(chunk);
        if direction == Direction::Up && line.ends_with(" HTTP/1.1") {
            state.requests.push(line);
        }
        if *since != state.changes {
            (*passed, *since) = (0, state.changes);
        }
        *passed += chunk.len() as u64;
        match &mut state.mode {
            Mode::Pass => Some(Duration::ZERO),
            Mode::Delay(delay) => Some(*delay),
            Mode::Refuse => None,
            Mode::BlackHole => self.block(state),
            Mode::CutUploads { after, times } | Mode::CutDownloads { after, times } => {
                let (is_full, is_left) = (*passed >= *after, *times > 0);
                let is_mine = matches!(state.mode, Mode::CutUploads { .. }) == (direction == Direction::Up);
                if !(is_full && is_left && is_mine) {
                    return Some(Duration::ZERO);
                }
                if let Mode::CutUploads { times, .. } | Mode::CutDownloads { times, .. } = &mut state.mode {
                    *times -= 1;
                }
                state.cuts += 1;
                None
            }
        }
    }

    /// Blocks until something is changed; then the connection is over.
    fn block(&self, mut state: MutexGuard<'_, State>) -> Option<Duration> {
        let now = state.changes;
        while state.changes == now {
            state = self.changed.wait(state).unwrap();
        }
        None
    }
}

impl Hold {
    fn wants(&self, chunk: &[u8]) -> bool {
        let line = first_line(chunk);
        line.starts_with(self.method) && line.contains(&self.needle)
    }
}

fn first_line(chunk: &[u8]) -> String {
    let line = chunk.split(|byte| *byte == b'\r').next().unwrap_or_default();
    String::from_utf8_lossy(line).into_owned()
}
