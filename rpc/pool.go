package rpc

import (
	"sync"

	"github.com/sutra-grid/sutra/rpc/pki"
)

// Pool holds the master's connections, one an agent.
type Pool struct {
	metrics     *Metrics
	credentials func() []*pki.Credentials // nil: in the clear

	mu    sync.Mutex       // guards links
	links map[string]*link // by agent id
}

// NewPool makes an empty pool of connections that are made with the master's credentials; nil: in the clear. m may be nil.
func NewPool(credentials func() []*pki.Credentials, m *Metrics) *Pool {
	return &Pool{credentials: credentials, metrics: m, links: map[string]*link{}}
}

// Agent returns the channel to an agent. An endpoint other than last time's drops the old connection.
func (p *Pool) Agent(id, endpoint string) *Channel {
	p.mu.Lock()
	l := p.links[id]
	var old *link
	if l == nil || l.endpoint != endpoint {
		old = l
		l = newLink(endpoint, Trust{Credentials: p.credentials, Peer: pki.Peer{Kind: pki.Agent, Name: id}}, p.metrics)
		p.links[id] = l
	}
	p.mu.Unlock()
	if old != nil {
		old.close()
	}
	return &Channel{peer: "agent " + id, unreachable: AgentUnreachable, link: l, metrics: p.metrics}
}

// Drop closes the connection to an agent, if there is one; the next call dials anew.
func (p *Pool) Drop(id string) {
	p.mu.Lock()
	l := p.links[id]
	delete(p.links, id)
	p.mu.Unlock()
	if l != nil {
		l.close()
	}
}

// Close drops all connections.
func (p *Pool) Close() {
	p.mu.Lock()
	links := p.links
	p.links = map[string]*link{}
	p.mu.Unlock()
	for _, l := range links {
		l.close()
	}
}
